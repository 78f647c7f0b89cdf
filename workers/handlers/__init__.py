"""Running users' handlers: in threads, or on an asyncio loop in a thread of its own, beside the worker's loop."""
