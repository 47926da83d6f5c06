"""Early exits: a model whose depth depends on its input, by heads after some of its blocks."""
