"""The server: connections, routes, streams, limits and what is told of them. It needs the extra [serve]."""
