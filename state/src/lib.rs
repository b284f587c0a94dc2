//! Keys and bytes: the keyed state of operators, in key-group segments. Knows no ring and no
//! operator logic.
//!
//! Every change goes through the worker's one transaction (`testudo_shm::txn::Txn`), so that a
//! step's state, positions and output are committed by one store and a crash at any instruction
//! leaves a whole step or none.
//!
//! The modules stand in the order in which a key meets them.

pub mod error;

pub mod key;

pub mod memory;

mod raw;

pub mod group;

mod heap;

mod verify;

mod moving;

mod line;

mod slots;

pub mod table;

pub mod value;

pub mod list;

pub mod map;

pub mod slice;

pub mod timer;

pub mod expire;

pub mod migrate;

pub mod disk;

pub mod checkpoint;

pub use error::StateError;
pub use expire::Expiry;
pub use group::Groups;
pub use key::{GROUPS_DEFAULT, KeyHash, group_of};
pub use list::List;
pub use map::Map;
pub use memory::Gauge;
pub use migrate::{Leftover, Migrated};
pub use slice::Slices;
pub use slots::{AHEAD, Ahead};
pub use table::Table;
pub use timer::{DueTimer, Timers};
pub use value::Value;
