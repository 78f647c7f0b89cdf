"""The way to the APIs: transport, DNS, HTTP/1.1 and HTTP/2, the pool. Nothing here knows what a stream is."""
