"""Secure aggregation: the coordinator learns the sum of a round's updates and nothing else about any of them.

The protocol is that of Bonawitz et al. (CCS 2017, arXiv 1611.04482), with every pair of clients masked. Each round,
between training and the next adapter, the cohort goes through five steps, in each of which every client sends one
message and gets the others':

1. advertise: two fresh X25519 keys and the digest of a random seed, signed by the client's identity key;
2. share: Shamir shares of the mask key and of the seed, each sealed for one peer;
3. mask: the update as integers modulo 2^32, plus PRG(seed), plus or minus PRG(pair secret) for every peer;
4. confirm: a signature over the list of those whose masked update arrived;
5. unmask: for a peer on that list the share of its seed, for any other the share of its mask key; never both.

`fixed` holds the integers, `masks` the PRG, `shamir` the shares, `keys` the rest of the cryptography and `steps` what
crosses the wire.

What it protects from. A coordinator that follows the protocol, and anybody who reads its memory, disk or traffic,
learns of a round the sum over at least `threshold` of the cohort, and over no fewer clients than each client's own
policy demands. A coordinator that does not follow it can stop a round or spoil its sum, but as long as fewer than
2 t - n of the n clients help it, it cannot see less than a sum over t honest and dishonest clients together:

- it cannot put keys of its own in place of a client's, or a client's keys of another round: each client checks every
  signature against the identity keys pinned in its own policy;
- it cannot tell clients different stories about who dropped out: a client gives shares only after t clients have
  signed the list it was told;
- it cannot have both shares of one client, nor the sum of the same updates over two lists: a client reveals shares
  for one list in a round, and remembers that list on its disk.

What it does not protect from: identity keys that the coordinator itself had pinned (a Sybil cohort), t clients that
pool what they know, what the sum itself tells (with differential privacy: what the noise allows), clients that send
a harmful update or useless shares, and the knowledge of who took part when. No credit is taken for it in the privacy
account: each client's epsilon is what its own noise gives.
"""
