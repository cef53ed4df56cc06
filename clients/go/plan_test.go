package tokenbroker

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

func dueAfter(t *testing.T, p *plan, since time.Time, expected time.Duration) {
	t.Helper()
	at, ok := p.due()
	if !ok || at.Sub(since) != expected {
		t.Fatalf("due after %s (%t), expected %s", at.Sub(since), ok, expected)
	}
}

func notDue(t *testing.T, p *plan) {
	t.Helper()
	if at, ok := p.due(); ok {
		t.Fatalf("due at %s", at)
	}
}

func TestTheFirstStreamCollectsTheAdditionsOfATenthOfASecond(t *testing.T) {
	now := time.Now()
	p := newPlan()
	notDue(t, &p)
	p.add("b", now)
	p.add("a", now.Add(90*time.Millisecond))
	dueAfter(t, &p, now, 100*time.Millisecond)
	if s := p.open(now.Add(100 * time.Millisecond)); !slices.Equal(s.accounts, []string{"a", "b"}) {
		t.Fatal(s.accounts)
	}
	p.answered(p.next)
	notDue(t, &p)
}

func TestStreamsForAdditionsAreOpenedOnceInFiveSeconds(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	p.answered(p.open(now))
	p.add("b", now.Add(time.Second))
	dueAfter(t, &p, now, 5*time.Second)
	p.answered(p.open(now.Add(5 * time.Second)))
	p.add("c", now.Add(time.Minute))
	dueAfter(t, &p, now, time.Minute+100*time.Millisecond)
}

func TestTheOldStreamIsReplacedWhenTheNewOneHasAnswered(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	first := p.open(now)
	if p.answered(first) != nil {
		t.Fatal("nothing was to be replaced")
	}
	p.add("b", now)
	second := p.open(now)
	if p.current != first {
		t.Fatal("the first stream was given up too early")
	}
	if p.answered(second) != first {
		t.Fatal("the first stream was not given up")
	}
	if p.ended(first) {
		t.Fatal("the end of a replaced stream counts")
	}
}

func TestAStreamThatBroughtAMessageIsOpenedAgainAtOnceAndOthersAfterGrowingPauses(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	s := p.open(now)
	p.answered(s)
	p.message(s)
	p.ended(s)
	now = now.Add(time.Second)
	p.afterEnd(s, nil, now, 0)
	dueAfter(t, &p, now, 0)
	for _, pause := range []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000} {
		s := p.open(now)
		if !p.ended(s) {
			t.Fatal("the end of a stream that was never answered does not count")
		}
		p.afterEnd(s, nil, now, 0)
		dueAfter(t, &p, now, pause*time.Millisecond)
	}
}

func TestAStreamThatEndsAtOnceCountsAsFailedWhateverItDelivered(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	for _, pause := range []time.Duration{100, 200, 400} {
		s := p.open(now)
		p.answered(s)
		p.message(s)
		p.ended(s)
		p.afterEnd(s, nil, now, 0)
		dueAfter(t, &p, now, pause*time.Millisecond)
	}
}

func TestAStreamThatIsNotAnsweredIsGivenUpAfterTwentySeconds(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	hung := p.open(now)
	dueAfter(t, &p, now, 20*time.Second)
	now = now.Add(20 * time.Second)
	if !p.ended(hung) {
		t.Fatal("its end does not count")
	}
	p.afterEnd(hung, nil, now, 0)
	dueAfter(t, &p, now, 100*time.Millisecond)
	next := p.open(now)
	if p.answered(hung) != hung {
		t.Fatal("an answer that came too late keeps the stream")
	}
	if p.answered(next) != nil || p.current != next {
		t.Fatal("the next stream is not used")
	}
}

func TestThePauseOfAStreamIsTheBrokersUpToHalfAMinute(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	s := p.open(now.Add(-time.Minute))
	p.answered(s)
	p.message(s)
	p.ended(s)
	p.afterEnd(s, &Error{RetryAfter: time.Hour}, now, 0)
	dueAfter(t, &p, now, 30*time.Second)
}

func TestThePauseOfAShedStreamIsAtLeastTheBrokers(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	s := p.open(now)
	p.ended(s)
	p.afterEnd(s, &Error{RetryAfter: 3 * time.Second}, now, 0)
	dueAfter(t, &p, now, 3*time.Second)
}

func TestTheEndOfAStreamWhoseSuccessorIsBeingOpenedSaysNothing(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.add("a", now)
	first := p.open(now)
	p.answered(first)
	p.reopen(now)
	second := p.open(now)
	if p.ended(first) {
		t.Fatal("it counts")
	}
	if p.answered(second) != nil {
		t.Fatal("the ended stream is given up again")
	}
}

func TestAThousandAccountsAreWatchedAndNoMore(t *testing.T) {
	now := time.Now()
	p := newPlan()
	for i := range 1000 {
		if !p.add(fmt.Sprint(i), now) {
			t.Fatal(i)
		}
	}
	if p.add("1000", now) || p.add("1", now) {
		t.Fatal("too many")
	}
	p.remove("1")
	if !p.add("1000", now) {
		t.Fatal("no room after a removal")
	}
}

func TestNothingIsPlannedWithoutAccounts(t *testing.T) {
	now := time.Now()
	p := newPlan()
	p.reopen(now)
	p.add("a", now)
	dueAfter(t, &p, now, 100*time.Millisecond)
	p.remove("a")
	notDue(t, &p)
}
