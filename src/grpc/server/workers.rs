//! The threads that serve connections. Each is a runtime of its own: what a connection needs never moves
//! between threads, and a commit of the journal wakes each of them once.

use std::{
    future::Future,
    io, mem,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle},
    task,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::warn;

/// How long a thread may take to end once it was told.
const END_WITHIN: Duration = Duration::from_secs(5);

/// The threads. They end with [`Workers::end`], or when this is dropped.
#[derive(Debug)]
pub struct Workers {
    all: Vec<Worker>,
    end: CancellationToken,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Clone, Debug)]
struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

/// A connection's place on a thread, for as long as this lives.
#[derive(Debug)]
pub(super) struct Seat(Worker);

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// When the system gives no more threads or descriptors.
    pub fn start(count: NonZeroUsize) -> io::Result<Self> {
        let end = CancellationToken::new();
        // Those that were started end with it if the next one cannot be.
        let mut workers = Self { all: vec![], end: end.clone(), threads: Mutex::default() };
        for number in 0..count.get() {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let connections = Arc::default();
            workers.all.push(Worker { runtime: runtime.handle().clone(), connections });
            let end = end.clone();
            let thread = thread::Builder::new()
                .name(format!("serve-{number}"))
                // What is left at the end goes with the runtime.
                .spawn(move || runtime.block_on(end.cancelled()))?;
            workers.threads().push(thread);
        }
        Ok(workers)
    }

    /// A place on the thread with the fewest connections.
    pub(super) fn least_busy(&self) -> Seat {
        let connections = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        // There is at least one.
        let worker = self.all.iter().min_by_key(connections).unwrap_or(&self.all[0]);
        worker.connections.fetch_add(1, Ordering::Relaxed);
        Seat(worker.clone())
    }

    /// Ends the threads, and what still runs on them.
    pub async fn end(&self) {
        self.end.cancel();
        let threads = mem::take(&mut *self.threads());
        for thread in threads {
            let joined = task::spawn_blocking(move || thread.join());
            if timeout(END_WITHIN, joined).await.is_err() {
                warn!("a serving thread did not end in time");
            }
        }
    }
}

impl Workers {
    fn threads(&self) -> MutexGuard<'_, Vec<thread::JoinHandle<()>>> {
        // No code panics while it holds this lock.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl Seat {
    /// Runs `task` on this place's thread to its end; dropped before, it ends there too.
    pub(super) fn run<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> AbortOnDropHandle<T> {
        AbortOnDropHandle::new(self.0.runtime.spawn(task))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn thread_of(seat: &Seat) -> String {
        let name = async { thread::current().name().unwrap_or_default().to_owned() };
        seat.run(name).await.unwrap()
    }

    #[tokio::test]
    async fn connections_go_to_the_thread_that_has_the_fewest() {
        let workers = Workers::start(NonZeroUsize::new(3).unwrap()).unwrap();
        let mut seats = vec![];
        for expected in ["serve-0", "serve-1", "serve-2", "serve-0"] {
            let seat = workers.least_busy();
            assert_eq!(thread_of(&seat).await, expected);
            seats.push(seat);
        }
        drop(seats.remove(1));
        assert_eq!(thread_of(&workers.least_busy()).await, "serve-1");
        workers.end().await;
    }

    #[tokio::test]
    async fn what_still_runs_at_the_end_is_cut_and_the_threads_are_gone() {
        let workers = Workers::start(NonZeroUsize::MIN).unwrap();
        let seat = workers.least_busy();
        let (held, mut gone) = tokio::sync::oneshot::channel::<()>();
        let endless = seat.run(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        workers.end().await;
        assert!(gone.try_recv().is_err());
        assert!(endless.await.is_err());
    }
}
