"""The aggregation server: provisioning, SuperLink, rounds, coordinators' service, simulation."""
