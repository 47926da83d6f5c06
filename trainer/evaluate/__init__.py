"""Language models judged on tasks: likelihoods of choices, generated answers, bits per byte, with intervals."""
