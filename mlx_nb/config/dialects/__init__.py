"""Settings of other programs, read as what they mean here, and ours written as theirs."""
