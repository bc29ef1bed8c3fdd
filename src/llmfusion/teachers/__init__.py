"""Teachers: their final hidden states cached once a corpus, and the texts they write (SeqKD)."""
