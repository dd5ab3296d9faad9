"""Wire protocols as pure functions and state machines: no sockets, no clock, no event loop."""
