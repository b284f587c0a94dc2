//! What brings a worker back: the choice of `--tier`, and what each choice does to the job.
//!
//! Called by `recovery`.

use super::{Args, Played, hotupdate, kill, play};
use crate::report::Failure;
use std::path::Path;
use testudo::prelude::*;

/// What brings a worker back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Means {
    /// A replica that follows the worker's steps, after a SIGKILL
    #[value(name = "1")]
    Replica,
    /// A standby that waits beside the workers, after a SIGKILL
    #[value(name = "2")]
    Standby,
    /// A new process, after a SIGKILL
    #[value(name = "3")]
    Respawn,
    /// Not a worker but the supervisor is killed; another one takes the job over
    Supervisor,
    /// A process prepared before, while the worker gives way between two steps: nobody is killed
    #[value(name = "hotupdate")]
    HotUpdate,
}

impl Means {
    /// How it is called on the command line.
    pub fn label(self) -> &'static str {
        match self {
            Self::Replica => "1",
            Self::Standby => "2",
            Self::Respawn => "3",
            Self::Supervisor => "supervisor",
            Self::HotUpdate => "hotupdate",
        }
    }

    /// The job's settings, for this choice.
    pub fn settings(self, settings: Settings) -> Settings {
        match self {
            Self::Supervisor => settings,
            Self::Replica => Settings { tier: Some(Tier::Replica), ..settings },
            Self::Standby => Settings { tier: Some(Tier::Standby), ..settings },
            Self::Respawn => Settings { tier: Some(Tier::Respawn), ..settings },
            Self::HotUpdate => Settings { name: hotupdate::name(), ..settings },
        }
    }

    /// Runs the job and does to its workers what this choice mends.
    pub(super) fn play(self, job: Job, args: &Args, folder: &Path) -> Result<Played, Failure> {
        match self {
            // The supervisor's deaths have a run of their own.
            Self::Replica | Self::Standby | Self::Respawn | Self::Supervisor => {
                play(job, args, folder, kill)
            }
            Self::HotUpdate => play(job, args, folder, hotupdate::renew),
        }
    }
}
