"""What several ranks cost a store and each other, up to many thousands: the real code against a model of a store, on a
clock that only the model moves."""
