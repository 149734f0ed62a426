"""An upstream of our own: a real HTTP server that speaks the Anthropic format, and misbehaves on demand.

A prompt overrides the server's script for its own answer: `[[tokens=300 pace=0 fault=cut at=1234 rst=true]]`
anywhere in the last user message. This room imports nothing else of aisse: it stands for a server elsewhere. Begin with
`script`, the plan of an answer; `server` plays it.
"""

from aisse.simulator.script import Script
from aisse.simulator.server import Record, Simulator, Stats

__all__ = ["Record", "Script", "Simulator", "Stats"]
