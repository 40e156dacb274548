"""Messages of etcd's v3 API: etcd.proto, and what scripts/gen_etcdpb.py made of it."""
