package tokenbroker

import (
	"slices"
	"time"
)

const (
	mostWatched          = 1000
	additionsDelay       = 100 * time.Millisecond
	additionsInterval    = 5 * time.Second
	firstPauseOfWatch    = 100 * time.Millisecond
	longestPauseOfWatch  = 10 * time.Second
	pauseUnauthenticated = 10 * time.Second
	longestOpening       = 20 * time.Second // how long a stream may take to answer
	shortestLife         = time.Second      // a stream that ends earlier counts as failed, whatever it delivered
	longestRetryInfo     = 30 * time.Second
	unusedAfter          = time.Hour
)

// plan decides when streams are opened, and with which accounts. It does nothing by itself. Its fields are protected
// by the mutex of the client.
//
// There are at most two streams: the current one, and the next one, which takes its place when it has answered. So no
// replacement is missed while a stream is being replaced.
type plan struct {
	members       map[string]struct{} // the accounts to be watched
	current       *stream
	next          *stream
	firstAddition time.Time // of those that no stream has; zero if there is none
	lastAddition  time.Time // when a stream was last opened for additions
	reopenAt      time.Time // when to open a stream for another reason; zero if there is none
	failures      int       // streams in a row that brought no message, or ended at once
}

// stream is one call of WatchTokens.
type stream struct {
	accounts  []string
	openedAt  time.Time
	cancel    func() // nil before the stream is being opened
	delivered bool   // a message has arrived
}

func newPlan() plan { return plan{members: make(map[string]struct{})} }

// add puts an account on the watch, if there is room, and reports whether it was not there before.
func (p *plan) add(account string, now time.Time) bool {
	if _, known := p.members[account]; known || len(p.members) >= mostWatched {
		return false
	}
	p.members[account] = struct{}{}
	if p.firstAddition.IsZero() {
		p.firstAddition = now
	}
	return true
}

func (p *plan) remove(account string) { delete(p.members, account) }

// due returns when to open a stream or, if there is a next one, when to give that up. It returns false if there is
// nothing to do.
func (p *plan) due() (time.Time, bool) {
	switch {
	case p.next != nil:
		return p.next.openedAt.Add(longestOpening), true
	case len(p.members) == 0:
		return time.Time{}, false
	case !p.reopenAt.IsZero():
		return p.reopenAt, true
	case !p.firstAddition.IsZero():
		at := p.firstAddition.Add(additionsDelay)
		if !p.lastAddition.IsZero() {
			at = latest(at, p.lastAddition.Add(additionsInterval))
		}
		return at, true
	default:
		return time.Time{}, false
	}
}

// open returns the next stream, with all accounts on it.
func (p *plan) open(now time.Time) *stream {
	if !p.firstAddition.IsZero() {
		p.lastAddition = now
	}
	p.firstAddition, p.reopenAt = time.Time{}, time.Time{}
	s := &stream{accounts: make([]string, 0, len(p.members)), openedAt: now}
	for name := range p.members {
		s.accounts = append(s.accounts, name)
	}
	slices.Sort(s.accounts)
	p.next = s
	return s
}

// answered makes the stream the current one, and returns the one to be ended, or nil: the one that it replaces, or
// itself, if it was given up before.
func (p *plan) answered(s *stream) (replaced *stream) {
	if s != p.next {
		return s
	}
	replaced, p.current, p.next = p.current, s, nil
	return replaced
}

// message notes that the stream works.
func (*plan) message(s *stream) {
	s.delivered = true
}

// reopen plans a stream for the given time, if none is planned earlier and there is something to watch.
func (p *plan) reopen(at time.Time) {
	if len(p.members) == 0 {
		return
	}
	if p.reopenAt.IsZero() || at.Before(p.reopenAt) {
		p.reopenAt = at
	}
}

// ended notes that a stream has ended, and reports whether that says anything: it does not if another one has taken its
// place, or is about to.
func (p *plan) ended(s *stream) bool {
	switch s {
	case p.current:
		p.current = nil
		return p.next == nil
	case p.next:
		p.next = nil
		return true
	default:
		return false
	}
}

// afterEnd plans the stream that follows one which ended for no reason that concerns its accounts.
func (p *plan) afterEnd(s *stream, err *Error, now time.Time, random float64) {
	var pause time.Duration
	if s.delivered && now.Sub(s.openedAt) >= shortestLife {
		p.failures = 0
	} else {
		pause = growingPause(firstPauseOfWatch, longestPauseOfWatch, p.failures, random)
		p.failures++
	}
	if err != nil {
		pause = max(pause, min(err.RetryAfter, longestRetryInfo))
	}
	p.reopen(now.Add(pause))
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
