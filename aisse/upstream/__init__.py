"""The way to the LLM's API: questions out, answers in, and what it means when there are none.

It may import `formats`, `simulator`, `local` and what lies below, and knows no streams and no readers. Begin with
`client`, which asks; `configured` finds out whom, and `keys` with whose key.
"""
