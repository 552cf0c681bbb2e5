"""What a person sees. Reads events and examples; never imports train."""
