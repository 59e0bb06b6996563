"""FAISS behind one small interface; the only room that imports it."""
