"""The lifetime privacy ledger of a data set."""
