"""The method: the SPLAM loss and its train step."""
