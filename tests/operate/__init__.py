"""Operating etcd: each `covey etcd` command against real members, alone and under load."""
