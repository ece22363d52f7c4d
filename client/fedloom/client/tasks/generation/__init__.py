"""Tasks that write text: a language model, a decoder behind an encoder, or one that sees or hears."""
