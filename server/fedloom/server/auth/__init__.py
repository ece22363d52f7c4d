"""Who may call what: certificates, the authority that issues them, revocation."""
