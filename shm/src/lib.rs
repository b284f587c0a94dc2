//! Bytes that two processes share. Knows segments, rings and transactions; knows no job, no
//! operator, no key.
//!
//! The modules stand in the order in which a byte meets them.

pub mod primitive;

pub mod fault;

pub mod segment;

pub mod arena;

pub mod missing;

pub mod hash;

pub mod record;

pub mod frame;

pub mod cursor;

pub mod ring;

pub mod producer;

pub mod scatter;

pub mod consumer;

pub mod blocks;

pub mod txn;

pub mod cell;

pub mod spill;

pub mod header;

pub mod death;

pub mod wait;

pub mod standby;

pub mod follow;

pub mod counters;

pub mod marker;

pub mod letter;

pub mod obituary;

pub mod last_words;

pub use testudo_shm_derive::record;
pub use {rkyv, zerocopy};
