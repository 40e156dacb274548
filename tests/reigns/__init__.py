"""Random histories of a set of registries in one process: takeovers, promotes, freezes, kills, cut lines, lost replies.

clockwork    an event loop whose time jumps, and whose processes can be frozen and killed
parts        logs, blobs, lines and servers in memory; what decides is the product's own
play         what clients do, what goes wrong meanwhile, and what must hold at the end
planted      bugs that the histories must find
"""
