//! Tap ports: the host's own stack as a station.
