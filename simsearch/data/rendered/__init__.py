"""The rendered sample: painted works, and photographs of them."""
