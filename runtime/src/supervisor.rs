//! The supervisor: the launched process. Creates the segments, spawns and watches the workers,
//! attaches a fresh one after any death, ends the job when its stages are done, reports. It is
//! never on the data path, but for standard input and output.
//!
//! `description` is what workers are told, `launch` sets a job up, `spawn` starts processes,
//! `watch` learns of deaths and signals, `recover` replaces workers, `console` moves lines between
//! rings and the terminal, `outputs` claims files, `report` says how it went, `progress` how it
//! goes.

pub(crate) mod description;

pub mod launch;

pub(crate) mod outputs;

pub(crate) mod spawn;

pub(crate) mod watch;

pub(crate) mod recover;

pub(crate) mod checkpoint;

pub(crate) mod resume;

pub(crate) mod orders;

pub(crate) mod console;

pub(crate) mod progress;

pub mod report;
