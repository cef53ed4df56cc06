package io.github.tokenbroker.client;

import com.google.gson.Gson;
import com.google.gson.reflect.TypeToken;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptors;
import io.grpc.ConnectivityState;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.NameResolverRegistry;
import io.grpc.Status;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.security.GeneralSecurityException;
import java.util.ArrayList;
import java.util.Collection;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import token_broker.v1.GetTokenRequest;
import token_broker.v1.GetTokenResponse;
import token_broker.v1.ReportRejectedTokenRequest;
import token_broker.v1.ReportRejectedTokenResponse;
import token_broker.v1.TokenServiceGrpc;
import token_broker.v1.WatchTokensRequest;
import token_broker.v1.WatchTokensResponse;

/** The calls to the broker over gRPC. */
final class GrpcTransport implements Transport {
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  static {
    NameResolverRegistry.getDefaultRegistry().register(new EndpointResolver.Provider());
  }

  private final Settings settings;
  private final Loop loop;
  private final Log log;
  private final BearerFile bearer;
  private TlsFiles files;
  private String lastFailure = "";
  private ManagedChannel channel;

  GrpcTransport(Settings settings, Loop loop, Log log) {
    this.settings = settings;
    this.loop = loop;
    this.log = log;
    this.bearer =
        settings.bearerFile() == null ? null : new BearerFile(settings.bearerFile(), loop, log);
    if (!settings.secure()) {
      this.channel = connect(InsecureChannelCredentials.create());
      return;
    }
    try {
      this.files = TlsFiles.read(settings);
      this.channel = connect(files.credentials());
    } catch (IOException | GeneralSecurityException | IllegalArgumentException unusable) {
      throw Errors.invalid("the files for TLS cannot be used: " + unusable);
    }
  }

  @Override
  public CompletableFuture<GetTokenResponse> getToken(
      String account, long newerThan, long timeout) {
    GetTokenRequest request =
        GetTokenRequest.newBuilder().setAccount(account).setNewerThanGeneration(newerThan).build();
    return unary(TokenServiceGrpc.getGetTokenMethod(), request, account, timeout);
  }

  @Override
  public CompletableFuture<ReportRejectedTokenResponse> report(
      String account, long generation, String upstreamCode, long timeout) {
    ReportRejectedTokenRequest request =
        ReportRejectedTokenRequest.newBuilder()
            .setAccount(account)
            .setGeneration(generation)
            .setUpstreamCode(upstreamCode)
            .build();
    return unary(TokenServiceGrpc.getReportRejectedTokenMethod(), request, account, timeout);
  }

  @Override
  public Runnable watch(Collection<String> accounts, StreamEvents events) {
    String used = currentBearer();
    ClientCall<WatchTokensRequest, WatchTokensResponse> call =
        channel().newCall(TokenServiceGrpc.getWatchTokensMethod(), CallOptions.DEFAULT);
    call.start(
        new ClientCall.Listener<WatchTokensResponse>() {
          @Override
          public void onHeaders(Metadata headers) {
            events.opened();
          }

          @Override
          public void onMessage(WatchTokensResponse message) {
            events.message(message);
            call.request(1);
          }

          @Override
          public void onClose(Status status, Metadata trailers) {
            if (status.isOk()) {
              events.ended(null, false);
              return;
            }
            TokenBrokerException error = Errors.from(status, trailers, null);
            events.ended(
                error,
                error.kind() == ErrorKind.UNAUTHENTICATED && !Objects.equals(rereadBearer(), used));
          }
        },
        headers(used));
    call.request(1);
    call.sendMessage(WatchTokensRequest.newBuilder().addAllAccounts(accounts).build());
    call.halfClose();
    return () -> call.cancel("the stream is no longer needed", null);
  }

  @Override
  public boolean refresh() {
    if (files == null) {
      return false;
    }
    try {
      TlsFiles found = TlsFiles.read(settings);
      if (found.equals(files)) {
        lastFailure = "";
        return false;
      }
      ManagedChannel old = channel;
      channel = connect(found.credentials());
      files = found;
      lastFailure = "";
      log.debug("the files for TLS have changed");
      // Calls that are in flight are completed.
      old.shutdown();
      return true;
    } catch (IOException | GeneralSecurityException | IllegalArgumentException unusable) {
      if (!unusable.toString().equals(lastFailure)) {
        lastFailure = unusable.toString();
        log.warning(
            "the files for TLS have changed and cannot be used, the last ones are kept: {0}",
            lastFailure);
      }
      return false;
    }
  }

  @Override
  public void close() {
    channel.shutdownNow();
  }

  private ManagedChannel connect(ChannelCredentials credentials) {
    return Grpc.newChannelBuilder(EndpointResolver.target(settings.endpoints()), credentials)
        .defaultServiceConfig(SERVICE_CONFIG)
        .disableServiceConfigLookUp()
        .keepAliveTime(20, TimeUnit.SECONDS)
        .keepAliveTimeout(10, TimeUnit.SECONDS)
        .keepAliveWithoutCalls(true)
        .build();
  }

  /**
   * Returns the channel for a new call. Connections that have failed are tried again at once, not
   * after gRPC's pause.
   */
  private ManagedChannel channel() {
    if (channel.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
      channel.resetConnectBackoff();
    }
    return channel;
  }

  /** Calls once, and once again if the bearer was refused and its file has another one now. */
  private <Q, S> CompletableFuture<S> unary(
      MethodDescriptor<Q, S> method, Q request, String account, long timeout) {
    long end = loop.now() + timeout;
    String used = currentBearer();
    CompletableFuture<S> result = new CompletableFuture<>();
    call(method, request, account, used, timeout)
        .whenComplete(
            (answer, thrown) -> {
              if (thrown == null) {
                result.complete(answer);
                return;
              }
              TokenBrokerException error = Errors.from(thrown, account);
              String other = error.kind() == ErrorKind.UNAUTHENTICATED ? rereadBearer() : used;
              if (Objects.equals(other, used)) {
                result.completeExceptionally(error);
                return;
              }
              loop.execute(
                  () ->
                      call(method, request, account, other, end - loop.now())
                          .whenComplete(
                              (second, failure) -> {
                                if (failure == null) {
                                  result.complete(second);
                                } else {
                                  result.completeExceptionally(failure);
                                }
                              }));
            });
    return result;
  }

  private <Q, S> CompletableFuture<S> call(
      MethodDescriptor<Q, S> method, Q request, String account, String used, long timeout) {
    CompletableFuture<S> result = new CompletableFuture<>();
    Channel authorized =
        ClientInterceptors.intercept(
            channel(), MetadataUtils.newAttachHeadersInterceptor(headers(used)));
    ClientCall<Q, S> call =
        authorized.newCall(
            method, CallOptions.DEFAULT.withDeadlineAfter(timeout, TimeUnit.NANOSECONDS));
    StreamObserver<S> observer =
        new StreamObserver<>() {
          @Override
          public void onNext(S answer) {
            result.complete(answer);
          }

          @Override
          public void onError(Throwable thrown) {
            result.completeExceptionally(
                Errors.from(
                    Status.fromThrowable(thrown), Status.trailersFromThrowable(thrown), account));
          }

          @Override
          public void onCompleted() {
            // A call without an answer ends with `onError`.
          }
        };
    try {
      ClientCalls.asyncUnaryCall(call, request, observer);
    } catch (RuntimeException failure) {
      result.completeExceptionally(Errors.from(failure, account));
    }
    return result;
  }

  private String currentBearer() {
    return bearer == null ? null : bearer.current();
  }

  private String rereadBearer() {
    return bearer == null ? null : bearer.read();
  }

  private static Metadata headers(String bearer) {
    Metadata headers = new Metadata();
    if (bearer != null) {
      headers.put(AUTHORIZATION, "Bearer " + bearer);
    }
    return headers;
  }

  private static final Map<String, Object> SERVICE_CONFIG = serviceConfig();

  /**
   * Returns the service config of all clients, without gRPC's retries. A client repeats an ask
   * itself, and knows why the attempts failed when its time is up. A call that has reached no
   * broker is still repeated.
   */
  private static Map<String, Object> serviceConfig() {
    try (InputStream file = GrpcTransport.class.getResourceAsStream("service_config.json")) {
      Map<String, Object> config =
          new Gson()
              .fromJson(
                  new InputStreamReader(Objects.requireNonNull(file), StandardCharsets.UTF_8),
                  new TypeToken<Map<String, Object>>() {});
      List<Object> methods = new ArrayList<>();
      for (Object method : (List<?>) config.get("methodConfig")) {
        Map<String, Object> copy = new HashMap<>();
        ((Map<?, ?>) method).forEach((key, value) -> copy.put((String) key, value));
        copy.remove("retryPolicy");
        methods.add(copy);
      }
      config.put("methodConfig", methods);
      return config;
    } catch (IOException unreadable) {
      throw new UncheckedIOException(unreadable);
    }
  }
}
