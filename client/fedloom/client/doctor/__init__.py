"""What would keep this site from taking part, found before it tries. No data is sent, no run is joined."""

from fedloom.client.doctor.examine import examine
from fedloom.client.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine"]
