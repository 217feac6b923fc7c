"""Wire formats of fsd: pure encoding and decoding, standard library only."""
