"""What a row is: recognized by its columns, read in the words of many tools, refused in one line."""
