"""Made-up recordings of orders on hospital wards."""
