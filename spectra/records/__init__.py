"""What is found, as frozen, versioned records that become JSON.  No torch, no files."""
