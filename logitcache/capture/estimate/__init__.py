"""What a build would take and give."""
