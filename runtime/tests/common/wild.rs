//! Stores to addresses that nobody handed out, for tests of what they can reach.

#![expect(unsafe_code, reason = "stores to arbitrary mapped addresses, in processes made for it")]

/// A mapping of a segment in this process.
#[derive(Debug)]
pub struct Wild {
    /// The segment's name.
    pub name: String,
    /// It may be written here.
    pub is_own: bool,
    start: usize,
    bytes: usize,
}

/// Bytes at the begin of a mapping in which something stands in any case.
const FRONT: usize = 64 << 10;

impl Wild {
    /// All of them, in the order of their addresses.
    pub fn mappings() -> Vec<Self> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our own mappings");
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        let wild = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-')?;
            let (start, end) = (number(start)?, number(end)?);
            let name = fields.get(5)?.strip_prefix("/memfd:")?.to_owned();
            Some(Self { name, is_own: fields[1].contains('w'), start, bytes: end - start })
        };
        maps.lines().filter_map(wild).collect()
    }

    fn place(&self, of: u64) -> *mut u64 {
        let offset = (of as usize % self.bytes.min(FRONT)) & !7;
        std::ptr::with_exposed_provenance_mut(self.start + offset)
    }

    /// Whether a store to some place of it ends the process that tries.
    pub fn is_refused(&self, of: u64) -> bool {
        let place = self.place(of);
        // SAFETY: where it is not refused, the canary of the caller sees it.
        let status = in_a_copy(|| unsafe { place.write_volatile(place.read_volatile()) });
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV
    }

    /// Whether its pages can be made writable.
    pub fn can_be_opened_up(&self) -> bool {
        let at = std::ptr::with_exposed_provenance_mut(self.start);
        let status = in_a_copy(|| {
            // SAFETY: a plain system call on a page that is mapped; nothing is stored.
            let done = unsafe { libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_WRITE) };
            if done == 0 {
                // SAFETY: ends this copy at once.
                unsafe { libc::_exit(1) };
            }
        });
        !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0
    }

    /// Stores to some place of it.
    pub fn store(&self, of: u64, value: u64) {
        // SAFETY: there is none; that is what the test is about. The page is mapped writable.
        unsafe { self.place(of).write_volatile(value) };
    }
}

/// Does something in a copy of this process that has the same mappings, and gives the status with
/// which the copy ended.
fn in_a_copy(deed: impl FnOnce()) -> libc::c_int {
    let mut status = 0;
    // SAFETY: the copy makes system calls and stores only, and ends without any clean-up.
    unsafe {
        let copy = libc::fork();
        if copy == 0 {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            deed();
            libc::_exit(0);
        }
        assert!(copy > 0, "a copy of this process");
        libc::waitpid(copy, &raw mut status, 0);
    }
    status
}
