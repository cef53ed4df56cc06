package io.github.tokenbroker.client;

import java.net.InetAddress;
import java.net.URI;
import java.net.UnknownHostException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Set;

/**
 * Checked settings of a client. Files are null if they are not set.
 *
 * @param endpoints the URLs of the broker
 * @param bearerFile the file with the bearer
 * @param caFile the file with the certificates to trust
 * @param clientCertFile the file with the client's certificate
 * @param clientKeyFile the file with its key
 * @param timeout how long a call waits that has no timeout of its own
 */
record Settings(
    List<Origin> endpoints,
    Path bearerFile,
    Path caFile,
    Path clientCertFile,
    Path clientKeyFile,
    Duration timeout) {

  /** Checks settings. */
  static Settings from(TokenClient.Builder builder) {
    List<Origin> endpoints = builder.endpoints.stream().map(Settings::endpoint).toList();
    if (endpoints.isEmpty()) {
      throw Errors.invalid("no endpoint is set");
    }
    String scheme = endpoints.get(0).scheme();
    if (!endpoints.stream().allMatch(endpoint -> endpoint.scheme().equals(scheme))) {
      throw Errors.invalid("all endpoints must have the same scheme");
    }
    if ((builder.clientCertFile == null) != (builder.clientKeyFile == null)) {
      throw Errors.invalid("the client's certificate and its key must be set together");
    }
    boolean secure = scheme.equals("https");
    if (!secure && (builder.caFile != null || builder.clientCertFile != null)) {
      throw Errors.invalid("certificates are set, but the endpoints are not https");
    }
    if (!secure && builder.bearerFile != null && !builder.plaintextBearerAllowed) {
      endpoints.stream()
          .filter(endpoint -> !isLoopback(endpoint))
          .findFirst()
          .ifPresent(
              endpoint -> {
                throw Errors.invalid(
                    "the bearer would be sent unencrypted to "
                        + endpoint.authority()
                        + ": use https, or call allowPlaintextBearer");
              });
    }
    if (builder.timeout.isNegative() || builder.timeout.isZero()) {
      throw Errors.invalid("the timeout must be above zero");
    }
    return new Settings(
        endpoints,
        builder.bearerFile,
        builder.caFile,
        builder.clientCertFile,
        builder.clientKeyFile,
        builder.timeout);
  }

  boolean secure() {
    return endpoints.get(0).scheme().equals("https");
  }

  private static Origin endpoint(String text) {
    URI uri;
    try {
      uri = URI.create(text);
    } catch (IllegalArgumentException malformed) {
      throw malformedEndpoint();
    }
    Origin origin = Origin.of(uri);
    String path = uri.getPath();
    boolean bare =
        (path == null || path.isEmpty() || path.equals("/"))
            && uri.getQuery() == null
            && uri.getFragment() == null;
    // The default ports of the schemes are never those of a broker.
    if (origin == null
        || !Set.of("http", "https").contains(origin.scheme())
        || !uri.getRawAuthority().matches("[^@]*:\\d+")
        || !bare) {
      throw malformedEndpoint();
    }
    if (origin.scheme().equals("https") && origin.host().contains("_")) {
      throw Errors.invalid("Java verifies no certificate of a host whose name has an underscore");
    }
    return origin;
  }

  /** Does not quote the endpoint, because somebody may have put a password into it. */
  private static TokenBrokerException malformedEndpoint() {
    return Errors.invalid("an endpoint must have the form http://host:port or https://host:port");
  }

  private static boolean isLoopback(Origin endpoint) {
    String host = endpoint.host();
    if (!host.startsWith("[")) {
      return host.equals("localhost") || host.matches("127(\\.\\d{1,3}){3}");
    }
    try {
      // Nothing is looked up for an address in brackets. Of ::ffff:127.0.0.1 it makes 127.0.0.1.
      return InetAddress.getByName(host).isLoopbackAddress();
    } catch (UnknownHostException malformed) {
      return false;
    }
  }
}
