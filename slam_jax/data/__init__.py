"""Host-side data: numpy in and out."""
