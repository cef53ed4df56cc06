package io.github.tokenbroker.client;

import java.lang.ref.Cleaner;
import java.lang.ref.Reference;
import java.nio.file.InvalidPathException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Executor;
import java.util.concurrent.SynchronousQueue;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.function.LongFunction;

/**
 * Gives a program the live tokens of accounts. A program makes one client, which all of its threads
 * share.
 *
 * <p>The client keeps each token for as long as the broker says, and hears of replacements at once.
 * It opens connections with the first call, and its threads keep no program alive. Calls that fail
 * throw a {@link TokenBrokerException}; futures fail with one. A future may be cancelled; what it
 * waits for goes on for other callers.
 */
public final class TokenClient implements AutoCloseable {
  private static final Cleaner CLEANER = Cleaner.create();

  /** A timeout whose sum with any time of a loop does not overflow. */
  private static final Duration LONGEST = Duration.ofDays(30 * 365);

  /** Completes what a thread of the program waits for, which does nothing else with it. */
  private static final Executor DIRECTLY = Runnable::run;

  /**
   * Completes the futures of the program, which may block in what it does then. The common pool is
   * not used, because other parts of the program can keep it busy.
   */
  private static final Executor COMPLETER =
      new ThreadPoolExecutor(
          0,
          Integer.MAX_VALUE,
          1,
          TimeUnit.SECONDS,
          new SynchronousQueue<>(),
          Threads.daemons("token-broker-results"));

  private final Settings settings;
  private final Core core;
  private final Cleaner.Cleanable cleanable;

  private TokenClient(Settings settings) {
    Log log = new Log(System.getLogger(TokenClient.class.getName()));
    Loop loop = new ThreadLoop();
    Core made = new Core(loop, new GrpcTransport(settings, loop, log), log);
    this.settings = settings;
    this.core = made;
    this.cleanable = CLEANER.register(this, made::close);
  }

  /**
   * Starts to describe a client.
   *
   * @param endpoints one or more URLs, {@code http://host:port} or {@code https://host:port}, all
   *     with the same scheme
   * @return a builder
   */
  public static Builder builder(String... endpoints) {
    return new Builder(List.of(endpoints));
  }

  /**
   * Makes a client with the settings of {@code TOKEN_BROKER_ENDPOINT} (several are separated by
   * commas), {@code TOKEN_BROKER_BEARER_FILE}, {@code TOKEN_BROKER_CA_FILE}, {@code
   * TOKEN_BROKER_CLIENT_CERT} and {@code TOKEN_BROKER_CLIENT_KEY}.
   *
   * @return a client
   */
  public static TokenClient fromEnvironment() {
    return fromEnvironment(System.getenv());
  }

  static TokenClient fromEnvironment(Map<String, String> environment) {
    String endpoints = environment.getOrDefault("TOKEN_BROKER_ENDPOINT", "");
    Builder builder =
        new Builder(
            Arrays.stream(endpoints.split(","))
                .map(String::strip)
                .filter(url -> !url.isEmpty())
                .toList());
    builder.bearerFile = file(environment, "TOKEN_BROKER_BEARER_FILE");
    builder.caFile = file(environment, "TOKEN_BROKER_CA_FILE");
    builder.clientCertFile = file(environment, "TOKEN_BROKER_CLIENT_CERT");
    builder.clientKeyFile = file(environment, "TOKEN_BROKER_CLIENT_KEY");
    return builder.build();
  }

  private static Path file(Map<String, String> environment, String name) {
    String value = environment.getOrDefault(name, "");
    try {
      return value.isEmpty() ? null : Path.of(value);
    } catch (InvalidPathException content) {
      // The exception's text quotes the value, which may be a secret.
      throw Errors.invalid(name + " is no path of a file");
    }
  }

  /**
   * Returns a live token of the account: the kept one if it may be used, otherwise the broker's.
   *
   * @param account the account's name
   * @return the token
   * @throws TokenBrokerException if there is no token; with the kind CANCELLED if the thread was
   *     interrupted
   */
  public Token token(String account) {
    return token(account, settings.timeout());
  }

  /**
   * Returns a live token of the account.
   *
   * @param account the account's name
   * @param timeout how long to wait at most
   * @return the token
   * @throws TokenBrokerException if there is no token; with the kind CANCELLED if the thread was
   *     interrupted
   */
  public Token token(String account, Duration timeout) {
    return await(token(account, timeout, DIRECTLY), account);
  }

  /**
   * Returns a live token of the account, without blocking.
   *
   * @param account the account's name
   * @return a future of the token
   */
  public CompletableFuture<Token> tokenAsync(String account) {
    return tokenAsync(account, settings.timeout());
  }

  /**
   * Returns a live token of the account, without blocking.
   *
   * @param account the account's name
   * @param timeout how long to wait at most
   * @return a future of the token
   */
  public CompletableFuture<Token> tokenAsync(String account, Duration timeout) {
    return token(account, timeout, COMPLETER);
  }

  private CompletableFuture<Token> token(String account, Duration timeout, Executor completer) {
    return within(account, timeout, nanos -> core.token(account, nanos, completer));
  }

  /**
   * Tells the broker that the API refused a token.
   *
   * @param account the account's name
   * @param generation the generation of the refused token
   * @param upstreamCode the code with which the API refused it, such as {@code 61003}
   * @return what the broker does
   * @throws TokenBrokerException if the report failed; with the kind CANCELLED if the thread was
   *     interrupted
   */
  public Report report(String account, long generation, String upstreamCode) {
    return await(report(account, generation, upstreamCode, settings.timeout(), DIRECTLY), account);
  }

  /**
   * Tells the broker that the API refused a token, without blocking.
   *
   * @param account the account's name
   * @param generation the generation of the refused token
   * @param upstreamCode the code with which the API refused it, such as {@code 61003}
   * @param timeout how long to wait at most
   * @return a future of what the broker does
   */
  public CompletableFuture<Report> reportAsync(
      String account, long generation, String upstreamCode, Duration timeout) {
    return report(account, generation, upstreamCode, timeout, COMPLETER);
  }

  private CompletableFuture<Report> report(
      String account, long generation, String upstreamCode, Duration timeout, Executor completer) {
    return within(
        account,
        timeout,
        nanos -> core.report(account, generation, upstreamCode, nanos, completer));
  }

  /**
   * Reports a token that the API refused, and returns a newer one. The interceptors for HTTP
   * libraries do this on their own.
   *
   * @param refused the refused token
   * @param upstreamCode the code with which the API refused it, such as {@code 61003}
   * @return a newer token; empty if there is none within the timeout, or if the broker says that
   *     the token was not at fault, so that the API's answer is final
   * @throws TokenBrokerException with the kind CLOSED or CANCELLED
   */
  public Optional<Token> replace(Token refused, String upstreamCode) {
    return replace(refused, upstreamCode, settings.timeout());
  }

  /**
   * Reports a token that the API refused, and returns a newer one.
   *
   * @param refused the refused token
   * @param upstreamCode the code with which the API refused it, such as {@code 61003}
   * @param timeout how long to wait at most
   * @return a newer token, or empty as for {@link #replace(Token, String)}
   * @throws TokenBrokerException with the kind CLOSED or CANCELLED
   */
  public Optional<Token> replace(Token refused, String upstreamCode, Duration timeout) {
    return Optional.ofNullable(
        await(replace(refused, upstreamCode, timeout, DIRECTLY), refused.account()));
  }

  /**
   * Reports a token that the API refused, and returns a newer one, without blocking.
   *
   * @param refused the refused token
   * @param upstreamCode the code with which the API refused it, such as {@code 61003}
   * @param timeout how long to wait at most
   * @return a future of a newer token, or of empty as for {@link #replace(Token, String)}
   */
  public CompletableFuture<Optional<Token>> replaceAsync(
      Token refused, String upstreamCode, Duration timeout) {
    CompletableFuture<Token> newer = replace(refused, upstreamCode, timeout, COMPLETER);
    CompletableFuture<Optional<Token>> result = newer.thenApply(Optional::ofNullable);
    // It does nothing unless the program has completed the result, such as by cancelling it.
    result.whenComplete((value, error) -> newer.cancel(false));
    return result;
  }

  private CompletableFuture<Token> replace(
      Token refused, String upstreamCode, Duration timeout, Executor completer) {
    String account = refused.account();
    return within(
        account,
        timeout,
        nanos -> core.replace(account, refused.generation(), upstreamCode, nanos, completer));
  }

  /**
   * Returns how long a call waits that has no timeout of its own.
   *
   * @return the timeout
   */
  public Duration timeout() {
    return settings.timeout();
  }

  /** Ends the stream and the connections. Calls that wait, and later ones, fail with CLOSED. */
  @Override
  public void close() {
    cleanable.clean();
  }

  @Override
  public String toString() {
    return "TokenClient" + settings.toString().substring("Settings".length());
  }

  /**
   * Makes a call with a timeout in nanoseconds. Its future refers to this client, which is not
   * collected while somebody waits.
   */
  private <T> CompletableFuture<T> within(
      String account, Duration timeout, LongFunction<CompletableFuture<T>> call) {
    if (timeout.isNegative() || timeout.isZero()) {
      return CompletableFuture.failedFuture(
          TokenBrokerException.of(ErrorKind.INVALID_ARGUMENT, "the timeout must be above zero")
              .account(account)
              .build());
    }
    CompletableFuture<T> future =
        call.apply(timeout.compareTo(LONGEST) < 0 ? timeout.toNanos() : LONGEST.toNanos());
    future.whenComplete((result, error) -> Reference.reachabilityFence(this));
    return future;
  }

  private static <T> T await(CompletableFuture<T> future, String account) {
    try {
      return future.get();
    } catch (InterruptedException interrupted) {
      future.cancel(false);
      Thread.currentThread().interrupt();
      throw cancelled(account, interrupted);
    } catch (CancellationException cancelled) {
      throw cancelled(account, cancelled);
    } catch (ExecutionException failed) {
      throw Errors.from(failed, account).forThisThread();
    }
  }

  private static TokenBrokerException cancelled(String account, Exception cause) {
    return TokenBrokerException.of(ErrorKind.CANCELLED, "the caller cancelled")
        .account(account)
        .cause(cause)
        .build();
  }

  /** Describes a client. */
  public static final class Builder {
    final List<String> endpoints;
    Path bearerFile;
    Path caFile;
    Path clientCertFile;
    Path clientKeyFile;
    Duration timeout = Duration.ofSeconds(5);
    boolean plaintextBearerAllowed;

    private Builder(List<String> endpoints) {
      this.endpoints = endpoints;
    }

    /**
     * Sets the file with the bearer. It is read again when it has changed.
     *
     * @param file the file
     * @return this builder
     */
    public Builder bearerFile(Path file) {
      this.bearerFile = file;
      return this;
    }

    /**
     * Sets the file with the certificates to trust, instead of Java's. It is read again when it has
     * changed.
     *
     * @param file the file, in PEM
     * @return this builder
     */
    public Builder caFile(Path file) {
      this.caFile = file;
      return this;
    }

    /**
     * Sets the files with the client's certificate and its key. They are read again when they have
     * changed.
     *
     * @param certificate the file with the certificate and its chain, in PEM
     * @param key the file with the key, as PKCS #8 in PEM
     * @return this builder
     */
    public Builder clientCertificate(Path certificate, Path key) {
      this.clientCertFile = certificate;
      this.clientKeyFile = key;
      return this;
    }

    /**
     * Sets how long a call waits that has no timeout of its own. The default is 5 seconds.
     *
     * @param value the timeout
     * @return this builder
     */
    public Builder timeout(Duration value) {
      this.timeout = value;
      return this;
    }

    /**
     * Sends the bearer unencrypted, also to other hosts than loopback.
     *
     * @return this builder
     */
    public Builder allowPlaintextBearer() {
      this.plaintextBearerAllowed = true;
      return this;
    }

    /**
     * Makes the client. This opens no connection.
     *
     * @return a client
     * @throws TokenBrokerException with the kind INVALID_ARGUMENT if the settings cannot be used
     */
    public TokenClient build() {
      return new TokenClient(Settings.from(this));
    }
  }
}
