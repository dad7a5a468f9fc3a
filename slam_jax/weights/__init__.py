"""Files <-> parameter trees."""
