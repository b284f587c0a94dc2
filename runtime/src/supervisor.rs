//! The supervisor: a process that the keeper starts, or a thread of a program that embeds a job.
//! Creates the segments, or adopts those of a supervisor that died; spawns and watches the workers,
//! attaches a fresh one after any death, ends the job when its stages are done, reports. It is
//! never on the data path, but for standard input and output.
//!
//! `description` is what workers are told, `launch` sets a job up, `spawn` starts processes,
//! `watch` learns of deaths and signals, `recover` replaces workers that died (`remains` is what
//! one left, `autopsy` what that says), `standby` has processes ready for that, `handover` replaces
//! those that run, `rewind` takes a region back to a checkpoint, `console` moves lines between
//! rings and the terminal (`printing` writes them), `outputs` claims files, `orders`, `steer` and
//! `renew` do what the control socket asks for, `report` says how it went, `progress` how it goes,
//! `folders` are where checkpoints go, `board` is all of that in numbers, for whoever asks.

pub(crate) mod description;

pub(crate) mod chronicle;

mod upgrade;

pub mod launch;

pub(crate) mod outputs;

pub(crate) mod program;

pub(crate) mod spawn;

pub(crate) mod watch;

pub(crate) mod ladder;

pub(crate) mod hang;

pub(crate) mod memory_events;

pub(crate) mod remains;

pub(crate) mod autopsy;

pub(crate) mod annals;

pub(crate) mod dead_letters;

pub(crate) mod care;

pub(crate) mod recover;

pub(crate) mod standby;

pub(crate) mod replicas;

pub(crate) mod handover;

pub(crate) mod checkpoint;

pub(crate) mod folders;

pub(crate) mod resume;

pub(crate) mod rewind;

pub(crate) mod orders;

pub(crate) mod steer;

pub(crate) mod renew;

pub(crate) mod inquiry;

pub(crate) mod update;

pub(crate) mod probation;

pub(crate) mod console;

mod printing;

pub(crate) mod progress;

pub(crate) mod board;

pub mod report;
