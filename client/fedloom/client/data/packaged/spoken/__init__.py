"""Made-up recordings that eSpeak NG speaks: orders on hospital wards, and words that steer a machine."""
