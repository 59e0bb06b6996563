"""The embedded sample: painted works, and photographs of them."""
