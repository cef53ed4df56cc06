package tokenbroker

import (
	"errors"
	"net"
	"net/url"
	"sync"

	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
)

// endpointsScheme is the scheme of the targets that endpointsResolver resolves. It is known to the connections of this
// package only.
const endpointsScheme = "token-broker-endpoints"

// endpointsBuilder builds resolvers of all endpoints of a client: each is resolved by DNS, and the addresses of all are
// used. Each address keeps the name of its endpoint, by which its certificate is verified.
type endpointsBuilder struct{ hosts []string }

func (endpointsBuilder) Scheme() string { return endpointsScheme }

func (b endpointsBuilder) Build(_ resolver.Target, cc resolver.ClientConn, options resolver.BuildOptions) (resolver.Resolver, error) {
	r := &endpointsResolver{cc: cc, found: make([][]resolver.Endpoint, len(b.hosts))}
	dns := resolver.Get("dns")
	for i, host := range b.hosts {
		name, _, err := net.SplitHostPort(host)
		if err != nil {
			return nil, err
		}
		target := resolver.Target{URL: url.URL{Scheme: "dns", Path: "/" + host}}
		child, err := dns.Build(target, &endpointConn{ClientConn: cc, parent: r, index: i, serverName: name}, options)
		if err != nil {
			r.Close()
			return nil, err
		}
		r.mu.Lock()
		r.children = append(r.children, child)
		r.mu.Unlock()
	}
	return r, nil
}

type endpointsResolver struct {
	cc resolver.ClientConn

	mu       sync.Mutex
	children []resolver.Resolver
	found    [][]resolver.Endpoint // by endpoint
}

func (r *endpointsResolver) ResolveNow(options resolver.ResolveNowOptions) {
	r.mu.Lock()
	children := r.children
	r.mu.Unlock()
	for _, child := range children {
		child.ResolveNow(options)
	}
}

func (r *endpointsResolver) Close() {
	r.mu.Lock()
	children := r.children
	r.mu.Unlock()
	for _, child := range children {
		child.Close()
	}
}

// endpointConn gets what the resolver of one endpoint finds.
type endpointConn struct {
	resolver.ClientConn
	parent     *endpointsResolver
	index      int
	serverName string
}

func (c *endpointConn) UpdateState(state resolver.State) error {
	found := state.Endpoints
	if len(found) == 0 {
		for _, address := range state.Addresses {
			found = append(found, resolver.Endpoint{Addresses: []resolver.Address{address}})
		}
	}
	for _, endpoint := range found {
		for i := range endpoint.Addresses {
			endpoint.Addresses[i].ServerName = c.serverName
		}
	}
	r := c.parent
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found[c.index] = found
	var all resolver.State
	for _, endpoints := range r.found {
		all.Endpoints = append(all.Endpoints, endpoints...)
	}
	for _, endpoint := range all.Endpoints {
		all.Addresses = append(all.Addresses, endpoint.Addresses...)
	}
	return r.cc.UpdateState(all)
}

// NewAddress is the former way to report addresses, which the resolver of DNS does not use.
func (c *endpointConn) NewAddress(addresses []resolver.Address) {
	_ = c.UpdateState(resolver.State{Addresses: addresses})
}

// ReportError reports that an endpoint could not be resolved, unless another one was.
func (c *endpointConn) ReportError(err error) {
	r := c.parent
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, endpoints := range r.found {
		if len(endpoints) > 0 {
			return
		}
	}
	r.cc.ReportError(err)
}

func (c *endpointConn) ParseServiceConfig(string) *serviceconfig.ParseResult {
	return &serviceconfig.ParseResult{Err: errors.New("service configs by DNS are not used")}
}
