//! The checkpoint folder: what a cut leaves on disk, and how it is found whole again.
//!
//! Every file of it is written and read through [`crate::disk`].
