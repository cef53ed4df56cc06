package io.github.tokenbroker.client;

import io.grpc.Attributes;
import io.grpc.EquivalentAddressGroup;
import io.grpc.NameResolver;
import io.grpc.NameResolverProvider;
import io.grpc.Status;
import io.grpc.StatusOr;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.URISyntaxException;
import java.net.UnknownHostException;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Executor;
import java.util.stream.Collectors;

/**
 * Finds the addresses of several endpoints for one channel, so that calls are spread over all of
 * them. Each address keeps the name of its endpoint, against which the certificate is checked.
 */
final class EndpointResolver extends NameResolver {
  private final List<Origin> endpoints;
  private final Executor executor;
  private Listener2 listener;
  private volatile boolean isShutDown;

  private EndpointResolver(List<Origin> endpoints, Executor executor) {
    this.endpoints = endpoints;
    this.executor = executor;
  }

  /** Returns the target of a channel to these endpoints. */
  static String target(List<Origin> endpoints) {
    String authorities = endpoints.stream().map(Origin::authority).collect(Collectors.joining(","));
    try {
      // This constructor escapes the brackets of IPv6 addresses.
      return new URI(Provider.SCHEME, "", "/" + authorities, null).toString();
    } catch (URISyntaxException impossible) {
      throw new IllegalArgumentException(impossible);
    }
  }

  @Override
  public String getServiceAuthority() {
    return endpoints.get(0).authority();
  }

  @Override
  public void start(Listener2 newListener) {
    listener = newListener;
    refresh();
  }

  @Override
  public void refresh() {
    executor.execute(this::resolve);
  }

  @Override
  public void shutdown() {
    isShutDown = true;
  }

  private void resolve() {
    List<EquivalentAddressGroup> groups = new ArrayList<>();
    List<String> unknown = new ArrayList<>();
    for (Origin endpoint : endpoints) {
      Attributes attributes =
          Attributes.newBuilder()
              .set(EquivalentAddressGroup.ATTR_AUTHORITY_OVERRIDE, endpoint.authority())
              .build();
      try {
        for (InetAddress address : InetAddress.getAllByName(endpoint.host())) {
          groups.add(
              new EquivalentAddressGroup(
                  new InetSocketAddress(address, endpoint.port()), attributes));
        }
      } catch (UnknownHostException notFound) {
        unknown.add(endpoint.host());
      }
    }
    if (isShutDown) {
      return;
    }
    StatusOr<List<EquivalentAddressGroup>> result =
        groups.isEmpty()
            ? StatusOr.fromStatus(
                Status.UNAVAILABLE.withDescription("no address is known of " + unknown))
            : StatusOr.fromValue(groups);
    listener.onResult(ResolutionResult.newBuilder().setAddressesOrError(result).build());
  }

  /** Lets channels find the resolver by the scheme of their targets. */
  static final class Provider extends NameResolverProvider {
    private static final String SCHEME = "token-broker";

    @Override
    public NameResolver newNameResolver(URI target, NameResolver.Args arguments) {
      if (!SCHEME.equals(target.getScheme())) {
        return null;
      }
      // The scheme does not matter for addresses.
      List<Origin> endpoints =
          List.of(target.getPath().substring(1).split(",")).stream()
              .map(authority -> Origin.of(URI.create("http://" + authority)))
              .toList();
      return new EndpointResolver(endpoints, arguments.getOffloadExecutor());
    }

    @Override
    public String getDefaultScheme() {
      return SCHEME;
    }

    @Override
    protected boolean isAvailable() {
      return true;
    }

    /** Does not become the resolver of targets without a scheme. */
    @Override
    protected int priority() {
      return 0;
    }
  }
}
