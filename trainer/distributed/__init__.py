"""The processes of a run: launch, rendezvous, collectives, hang detection, signals, and memory per rank."""
