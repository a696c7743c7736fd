"""An event comes in, mail goes out."""
