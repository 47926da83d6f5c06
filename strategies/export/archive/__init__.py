"""The Deep Compression archive: weight sharing, pruning and Huffman coding (Han et al. 2016)."""
