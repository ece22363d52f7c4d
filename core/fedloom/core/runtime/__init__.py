"""What every long-lived process needs: durable files, failpoints, memory."""
