"""A network on a volume: planes, slice windows, testing, fusion."""
