// The coordinator's services over gRPC-web, at the origin that served this page.

import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { JobService } from "../gen/shanty/v1/job_pb";
import { StatusService } from "../gen/shanty/v1/status_pb";
import { refused, token } from "./session";

const authorize: Interceptor = (next) => async (request) => {
  const value = token.peek();
  if (value) request.header.set("authorization", `Bearer ${value}`);
  try {
    return await next(request);
  } catch (error) {
    if (ConnectError.from(error).code === Code.Unauthenticated) refused.value = messageOf(error);
    throw error;
  }
};

const transport = createGrpcWebTransport({ baseUrl: location.origin, interceptors: [authorize] });

export const jobs = createClient(JobService, transport);
export const statuses = createClient(StatusService, transport);

/** What went wrong, in the coordinator's words. */
export function messageOf(error: unknown): string {
  return ConnectError.from(error).rawMessage || "the coordinator cannot be reached";
}

/** Whether asking again may help: the coordinator is away, or cut the connection. */
export function mayPass(error: unknown): boolean {
  const { code } = ConnectError.from(error);
  return code !== Code.NotFound && code !== Code.Unauthenticated && code !== Code.PermissionDenied && code !== Code.InvalidArgument;
}
